"""What pre-training is worth: BERT, in small."""
