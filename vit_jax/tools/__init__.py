"""What is run by hand: plan, preview, demo, and readers of compiled programs."""
