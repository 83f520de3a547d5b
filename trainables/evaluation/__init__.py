"""Quality numbers and the features they are taken on."""
