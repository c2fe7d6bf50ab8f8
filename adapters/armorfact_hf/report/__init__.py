"""What a run did: the record, and the page that shows it."""
