"""One trial of a study: what is trained, sampled, checked and evaluated."""
