"""What spoils pictures, for models that learn to mend them, and to measure how well they do."""
