"""A study whose results are in object storage."""
