#!/bin/sh
# A standby that streams from the service `postgres`: copied from it at the first start.
#
# In: STANDBY_PASSWORD, PGDATA; the arguments are the server's command. Never: touches a folder that has a database; starts
# one of which only a part was copied: without the end of the copy it would take itself for a primary.
# At the limit: a copy that fails is thrown away and begun anew.
set -eu
if [ ! -e "$PGDATA" ]; then
    copy=$PGDATA.new
    until rm -rf "$copy" && PGPASSWORD=$STANDBY_PASSWORD pg_basebackup --pgdata "$copy" --host postgres \
        --username standby --slot standby --write-recovery-conf --checkpoint fast; do
        sleep 2
    done
    mv "$copy" "$PGDATA"
fi
exec docker-entrypoint.sh "$@"
