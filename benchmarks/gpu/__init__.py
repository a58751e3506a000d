"""What is checked and measured on a GPU: `make gpu-pack` here, `make gpu-check` there."""
