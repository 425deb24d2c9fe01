#!/bin/sh
# A standby that streams from the service `postgres`: copied from it at the first start.
#
# In: STANDBY_PASSWORD; the arguments are the server's command. Never: touches a folder that has a database.
# At the limit: a copy that fails is thrown away and begun anew.
set -eu
until [ -s "$PGDATA/standby.signal" ] || [ -s "$PGDATA/PG_VERSION" ]; do
    PGPASSWORD=$STANDBY_PASSWORD pg_basebackup --pgdata "$PGDATA" --host postgres --username standby --slot standby \
        --write-recovery-conf --checkpoint fast || sleep 2
done
exec docker-entrypoint.sh "$@"
