"""What `mebm new` writes."""
