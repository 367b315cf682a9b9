"""Measuring what operations take on this device: alone at many sizes, and side by side."""
