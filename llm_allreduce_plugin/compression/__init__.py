"""What compression costs in accuracy, and from which link bandwidth down it pays."""
