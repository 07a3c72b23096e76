"""From which link bandwidth down compression pays: a model of the two-shot, fed with measured codec times."""
