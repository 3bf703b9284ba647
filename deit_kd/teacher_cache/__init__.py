"""What a teacher says of the training images, written once for many runs."""
