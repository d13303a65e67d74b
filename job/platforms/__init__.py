"""What differs between Docker, Kubernetes and SageMaker."""
