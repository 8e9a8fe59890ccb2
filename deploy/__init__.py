"""What runs beside the service: Prometheus, its alerts, and the dashboard."""
