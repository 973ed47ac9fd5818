"""What was measured, written down for people: one evaluation, a comparison, or the demo's report, as one HTML file."""

from sae_lens_gemma4.report.html import render_comparison, render_demo, render_evaluation

__all__ = ["render_comparison", "render_demo", "render_evaluation"]
