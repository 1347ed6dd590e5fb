"""Stage 4: registered version, built service and the decision that makes an adapter live."""
