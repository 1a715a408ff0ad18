"""Looks at everything a deployment stands on, and says of each thing how it is and what helps. One file for each foreign system."""
