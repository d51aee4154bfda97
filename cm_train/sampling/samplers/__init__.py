"""Ways from noise to images, each in a file of its own and reachable by the name that it is registered under."""
