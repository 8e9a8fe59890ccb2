"""What the service counts and says about itself, for Prometheus."""
