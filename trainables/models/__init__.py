"""A trained model as a file, and what is made of it: samples, calibration, views."""
