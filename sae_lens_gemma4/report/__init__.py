"""What was measured, written down for people: one evaluation, or the demo's before and after, as one HTML file."""

from sae_lens_gemma4.report.html import render_demo, render_evaluation

__all__ = ["render_demo", "render_evaluation"]
