"""Faster diffusion video and image generation, with its price in quality shown."""
