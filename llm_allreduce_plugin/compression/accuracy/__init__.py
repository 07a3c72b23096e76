"""What compression costs in accuracy: on made data, and on the layers of a real model."""
