"""Timelines of plans, predicted and measured: as data, text, SVG and Chrome traces."""
