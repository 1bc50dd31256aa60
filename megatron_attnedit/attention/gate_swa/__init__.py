"""GateSWA: gated attention that slides a window in most layers and stays full in a few."""
