"""Figures as they are printed in a paper: size, type, ink and layout."""
