"""What tests share: helpers live here, and no test imports a test."""
