"""What ``tune`` measures, and the profile that follows."""
