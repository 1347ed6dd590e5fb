"""Stage 5: the traffic that was served, its drift, and the rows worth a human label."""
