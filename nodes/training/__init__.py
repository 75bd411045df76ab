"""Training an HGR for the user's model: recording, both networks, calibration; stoppable and resumable."""
