"""The measures of an erasure, one a file."""
