"""Scripts that make the demo's weights; run them through `python -m demo.train`."""
