"""What a cell trains and is scored by, where two experiments share it."""
