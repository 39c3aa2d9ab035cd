"""Latents to pictures, with nothing but the VAE's decoder in memory.

stage.py  the stage
sheet.py  contact sheets
"""
