"""The attacks on an erasure, one a file."""
