"""What was measured of a kind of node: the file, which one a group uses, and how ranges follow from times."""
