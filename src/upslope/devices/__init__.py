"""What this machine computes with: processors, threads."""
