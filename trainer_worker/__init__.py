"""Trains: runs a trainer as a child process, judges and publishes what it made. No torch here; it lives in the children."""
