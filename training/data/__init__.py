"""Captioned pictures: where they come from, how they are decoded, augmented, encoded and put into batches."""
