#!/bin/sh
# The first primary, which takes writes only as long as it is the one that .env names.
#
# In: PRIMARY; the arguments are the server's command. Never: lets two servers take writes after a failover, however this one
# comes back. At the limit: a superuser may write all the same.
set -eu
[ "${PRIMARY:?has to be set}" = postgres ] || set -- "$@" -cdefault_transaction_read_only=on
exec docker-entrypoint.sh "$@"
