"""Cloudflare tunnel connector in asyncio. Start reading at ARCHITECTURE.md beside this file."""

__version__ = "0.1.0"
