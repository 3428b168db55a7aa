"""Side-by-side measurements. Nothing else imports this package."""
