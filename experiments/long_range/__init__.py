"""Long Range Arena, and the tasks that tell variants of attention apart."""
