"""What several test files share: tiny models, environments with a fault, stand-ins."""
