"""Arrays, pages and bits: how expert weights lie in memory and how to multiply with them."""
