"""Object stores: where a path may be a URL, s3:// or gs://, what is there is reached through here alone."""
