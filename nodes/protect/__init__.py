"""Protection without an HGR at hand: the one of a text encoder is found, or made at first use."""
