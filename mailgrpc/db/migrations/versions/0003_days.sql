-- Messages, deliveries, attempts and attachments in ranges of their ids, which are ranges of time:
-- an old range is dropped whole (docs/decisions/0016).
--
-- What a reader of the functions below must know: `id = ANY (array)` is not cut down to the ranges
-- that the array reaches into, `id BETWEEN two variables` is, when the statement starts, and a join
-- is for each of its keys. So every statement here that finds rows by an array or a join says first
-- between which ids they lie, and is planned once (force_generic_plan): a plan for each call would
-- look cheaper to the planner, and cost more than it saves.

DROP FUNCTION append_events(integer, deliveries[], smallint[], text);
DROP FUNCTION settle_due(timestamptz, deliveries[]);
DROP FUNCTION start_deliveries(bigint, integer, uuid[], uuid[], uuid[]);
DROP FUNCTION move_deliveries(integer, text, uuid[], integer[], smallint[], timestamptz[],
    smallint[], boolean[], boolean[], timestamptz[]);

CREATE FUNCTION first_of(p_id uuid[]) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT id FROM unnest(p_id) AS id ORDER BY id LIMIT 1 $$;
CREATE FUNCTION last_of(p_id uuid[]) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT id FROM unnest(p_id) AS id ORDER BY id DESC LIMIT 1 $$;

-- The lowest id that can have been made at this moment (core/ids.py).
CREATE FUNCTION first_id_at(p_moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT rpad(lpad(to_hex(floor(extract(epoch FROM p_moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid $$;

-- The ranges: each is a partition of each of the four tables, `<table>_<name>`.
CREATE TABLE days (
    name        text PRIMARY KEY,
    first_id    uuid NOT NULL,
    until_id    uuid NOT NULL,  -- the first that is not in it
    since       timestamptz,    -- the same as moments; NULL: from the beginning
    until       timestamptz NOT NULL,
    quiet_since timestamptz     -- since when nothing in it was seen to wait or be sent
);

CREATE FUNCTION hang_net(p_table text) RETURNS void LANGUAGE plpgsql
AS $$
BEGIN
    EXECUTE format('CREATE TABLE %1$s_net PARTITION OF %1$I DEFAULT', p_table);
    PERFORM tune_part(p_table, 'net');
END $$;

-- What a partition does not take over from its table.
CREATE FUNCTION tune_part(p_table text, p_name text) RETURNS void LANGUAGE plpgsql
AS $$
BEGIN
    IF p_table = 'deliveries' THEN  -- room for the changed row beside the old one
        EXECUTE format('ALTER TABLE deliveries_%s SET (fillfactor = 80)', p_name);
    END IF;
END $$;

DO $$
DECLARE
    v_until timestamptz := date_trunc('day', now(), 'UTC') + interval '2 days';
    v_cut   uuid := first_id_at(v_until);
    v_table text;
    v_key   text;
BEGIN
    FOR v_table, v_key IN VALUES ('messages', 'id'), ('deliveries', 'id'),
        ('attempts', 'delivery_id'), ('attachments', 'message_id')
    LOOP
        EXECUTE format('ALTER TABLE %1$I RENAME TO %1$s_before', v_table);
        EXECUTE format('ALTER INDEX %1$s_pkey RENAME TO %1$s_before_pkey', v_table);
        EXECUTE format('CREATE TABLE %1$I (LIKE %1$s_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS
            INCLUDING STORAGE) PARTITION BY RANGE (%2$I)', v_table, v_key);
        EXECUTE format('ALTER TABLE %I ADD PRIMARY KEY (%s)', v_table, CASE v_table
            WHEN 'attempts' THEN 'delivery_id, number' WHEN 'attachments' THEN 'message_id, position'
            ELSE 'id' END);
        PERFORM hang_net(v_table);
        -- Of a server whose clock is ahead.
        EXECUTE format('WITH ahead AS (DELETE FROM %1$s_before WHERE %2$I >= %3$L RETURNING *)
            INSERT INTO %1$I SELECT * FROM ahead', v_table, v_key, v_cut);
        EXECUTE format('ALTER TABLE %1$I ATTACH PARTITION %1$s_before
            FOR VALUES FROM (MINVALUE) TO (%2$L)', v_table, v_cut);
    END LOOP;
    INSERT INTO days (name, first_id, until_id, until)
    VALUES ('before', '00000000-0000-0000-0000-000000000000', v_cut, v_until);
END $$;
ALTER INDEX messages_correlation RENAME TO messages_before_correlation;
CREATE INDEX messages_correlation ON messages (project_id, correlation_id)
    WHERE correlation_id <> '';
ALTER FUNCTION enqueue_messages SET plan_cache_mode = force_generic_plan;

CREATE FUNCTION append_events(
    p_lane integer, p_moved deliveries[], p_old smallint[], p_actor text,
    p_first uuid DEFAULT NULL, p_last uuid DEFAULT NULL
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_nestloop = on SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    IF coalesce(cardinality(p_moved), 0) = 0 THEN RETURN; END IF;
    -- 0x6d670000: 'mg' and the lane, so that other users of advisory locks do not meet us.
    PERFORM pg_advisory_xact_lock(1835466752 + p_lane);
    INSERT INTO events (lane, seq, project_id, kind, occurred_at, actor, message_id, delivery_id,
        recipient, role, old_state, state, version, wait_reason, due_at, possibly_sent,
        suppression_reason, duplicate_of, attempt_count, call_id, channel, provider,
        attempt_started_at, attempt_ended_at, outcome, cause, status_code, enhanced_code, text,
        provider_message_id, retry_after_ms)
    SELECT p_lane, nextval('feed_seq'), d.project_id, 16, d.state_since, p_actor,
        message_of(d.id), d.id,
        d.recipient, d.role, p_old[d.ordinality], d.state, d.version, d.wait_reason, d.due_at,
        d.possibly_sent, d.suppression_reason, d.duplicate_of, d.attempt_count, d.call_id,
        d.channel, a.provider, d.attempt_started_at, a.ended_at, a.outcome, a.cause,
        a.status_code, a.enhanced_code, a.text, a.provider_message_id, a.retry_after_ms
    FROM unnest(p_moved) WITH ORDINALITY AS d
    LEFT JOIN LATERAL (SELECT * FROM attempts a
        WHERE a.delivery_id = d.id AND a.delivery_id BETWEEN p_first AND p_last
            AND a.number = d.attempt_count LIMIT 1) a ON true;
END $$;

CREATE FUNCTION start_deliveries(
    p_session bigint, p_lane integer, p_id uuid[], p_attempt uuid[], p_call uuid[]
) RETURNS SETOF deliveries LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_mine uuid[];
    v_rest uuid[];
    v_first uuid := first_of(p_id);
    v_last uuid := last_of(p_id);
    v_rows deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM workers w WHERE w.id = p_session AND w.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker session % has ended', p_session USING ERRCODE = 'MG001';
    END IF;
    SELECT array_agg(q.delivery_id) INTO v_mine FROM (
        SELECT q.delivery_id FROM due q
        WHERE q.delivery_id = ANY (p_id) AND q.session_id = p_session
        ORDER BY q.delivery_id FOR UPDATE
    ) q;

    WITH held AS MATERIALIZED (
        SELECT d.* FROM deliveries d
        WHERE d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last
            AND d.state IN (1, 3) ORDER BY d.id FOR UPDATE
    ), verdict AS (
        SELECT d.id, d.state AS old_state, a.attempt_id, a.call_id, v.reason,
            CASE WHEN d.expire_at <= v_now THEN 12 WHEN v.reason > 0 THEN 10 ELSE 2 END AS state
        FROM held d
        JOIN unnest(p_id, p_attempt, p_call) AS a(id, attempt_id, call_id) ON a.id = d.id
        CROSS JOIN LATERAL (SELECT coalesce(
            (SELECT s.reason FROM suppressions s
                WHERE s.project_id = d.project_id AND s.address = d.recipient),
            (SELECT 1 FROM preferences p WHERE p.project_id = d.project_id
                AND p.address = d.recipient AND p.blocked_flags & d.flags & ~1 <> 0),
            0)::smallint AS reason OFFSET 0) AS v
    ), moved AS (
        UPDATE deliveries d SET state = v.state, state_since = v_now, version = d.version + 1,
            wait_reason = 0, due_at = NULL,
            suppression_reason = CASE WHEN v.state = 10 THEN v.reason ELSE 0 END,
            attempt_count = d.attempt_count + (v.state = 2)::integer,
            attempt_id = CASE WHEN v.state = 2 THEN v.attempt_id END,
            call_id = CASE WHEN v.state = 2 THEN v.call_id ELSE d.call_id END,
            attempt_started_at = CASE WHEN v.state = 2 THEN v_now ELSE d.attempt_started_at END
        FROM verdict v WHERE d.id = v.id AND d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last
        RETURNING d AS row, v.old_state
    )
    SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
    INTO v_rows, v_old FROM moved m;

    -- What did not move: a start before this one did, it was suppressed or expired, or its due row
    -- has no business here any more.
    SELECT array_agg(m.id) INTO v_rest FROM unnest(v_mine) AS m(id)
    LEFT JOIN unnest(v_rows) AS r ON r.id = m.id AND r.state = 2 WHERE r.id IS NULL;
    IF v_rest IS NULL THEN
        -- Nobody has had an attempt that ended and is told by this.
        PERFORM append_events(p_lane, v_rows, v_old, '');
        RETURN QUERY SELECT r.* FROM unnest(v_rows) AS r;
        RETURN;
    END IF;
    DELETE FROM due q WHERE q.delivery_id = ANY (v_rest)
        AND NOT EXISTS (SELECT FROM deliveries d WHERE d.id = ANY (v_rest)
            AND d.id BETWEEN v_first AND v_last AND d.id = q.delivery_id AND d.state = 2);
    PERFORM append_events(p_lane, v_rows, v_old, '', v_first, v_last);
    RETURN QUERY SELECT d.* FROM unnest(p_id, p_attempt) AS a(id, attempt_id)
        JOIN deliveries d ON d.id = a.id AND d.attempt_id = a.attempt_id
        WHERE d.id = ANY (v_mine) AND d.id BETWEEN v_first AND v_last ORDER BY d.id;
END $$;

CREATE FUNCTION settle_due(p_now timestamptz, p_rows deliveries[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_nestloop = on SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    DELETE FROM due q WHERE q.delivery_id IN (SELECT r.id FROM unnest(p_rows) AS r
        WHERE r.state NOT IN (1, 3) OR r.due_at > p_now + interval '10 minutes');
    IF EXISTS (SELECT FROM unnest(p_rows) AS r WHERE r.state IN (1, 3)) THEN
        INSERT INTO due AS q (delivery_id, channel, project_id, priority, due_at)
        SELECT r.id, r.channel, r.project_id, r.priority, r.due_at FROM unnest(p_rows) AS r
        WHERE r.state IN (1, 3) AND r.due_at <= p_now + interval '10 minutes'
        ON CONFLICT (delivery_id) DO UPDATE
            SET due_at = excluded.due_at, session_id = NULL, claims = 0;
        INSERT INTO scheduled (delivery_id, channel, project_id, priority, due_at)
        SELECT r.id, r.channel, r.project_id, r.priority, r.due_at FROM unnest(p_rows) AS r
        WHERE r.state IN (1, 3) AND r.due_at > p_now + interval '10 minutes'
        ON CONFLICT (delivery_id) DO UPDATE SET due_at = excluded.due_at;
    END IF;
END $$;

CREATE FUNCTION move_deliveries(
    p_lane integer, p_actor text, p_id uuid[], p_version integer[], p_state smallint[],
    p_due_at timestamptz[], p_wait_reason smallint[], p_forced boolean[],
    p_possibly_sent boolean[], p_expire_at timestamptz[]
) RETURNS SETOF deliveries LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_first uuid := first_of(p_id);
    v_last uuid := last_of(p_id);
    v_rows deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    WITH held AS MATERIALIZED (
        SELECT d.id, d.state FROM deliveries d
        WHERE d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last ORDER BY d.id FOR UPDATE
    ), moved AS (
        UPDATE deliveries d SET state = r.state, state_since = v_now, version = d.version + 1,
            due_at = r.due_at, wait_reason = r.wait_reason, forced = r.forced,
            possibly_sent = r.possibly_sent, expire_at = r.expire_at, suppression_reason = 0,
            duplicate_of = NULL
        FROM held h
        JOIN unnest(p_id, p_version, p_state, p_due_at, p_wait_reason, p_forced, p_possibly_sent,
                p_expire_at)
            AS r(id, version, state, due_at, wait_reason, forced, possibly_sent, expire_at)
            ON r.id = h.id
        WHERE d.id = h.id AND d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last
            AND d.version = r.version
            AND d.state <> 2
        RETURNING d AS row, h.state AS old_state
    )
    SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
    INTO v_rows, v_old FROM moved m;
    DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT r.id FROM unnest(v_rows) AS r);
    PERFORM settle_due(v_now, v_rows);
    PERFORM append_events(p_lane, v_rows, v_old, p_actor, v_first, v_last);
    RETURN QUERY SELECT * FROM unnest(v_rows);
END $$;

CREATE OR REPLACE FUNCTION clear_messages(
    p_lane integer, p_actor text, p_project integer, p_message uuid[], p_force boolean,
    p_filter jsonb
) RETURNS TABLE (cleared integer, sending integer) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_first   uuid := first_of(p_message);
    v_last    uuid := last_delivery_of(last_of(p_message));
    v_id      uuid[];
    v_held    uuid[];
    v_sending uuid[];
    v_waiting uuid[];
    v_gone    uuid[];
    v_count   integer;
BEGIN
    SELECT array_agg(d.id ORDER BY d.id) INTO v_id
    FROM unnest(p_message) AS m(id)
    CROSS JOIN LATERAL (SELECT * FROM deliveries d WHERE d.id > m.id AND d.id <= last_delivery_of(m.id)
        AND d.id BETWEEN v_first AND v_last LIMIT 65535) AS d WHERE d.project_id = p_project;
    PERFORM FROM due q WHERE q.delivery_id = ANY (v_id) ORDER BY q.delivery_id FOR UPDATE;
    SELECT array_agg(d.id), array_agg(DISTINCT message_of(d.id)) FILTER (WHERE d.state = 2),
        array_agg(DISTINCT message_of(d.id)) FILTER (WHERE d.state IN (1, 3))
    INTO v_held, v_sending, v_waiting
    FROM (SELECT d.id, d.state FROM deliveries d
        WHERE d.id = ANY (v_id) AND d.id BETWEEN v_first AND v_last ORDER BY d.id FOR UPDATE) d;

    SELECT array_agg(m.id) INTO v_gone FROM unnest(p_message) AS m(id)
    WHERE m.id <> ALL (coalesce(v_sending, '{}'))
        AND (p_force OR m.id <> ALL (coalesce(v_waiting, '{}')))
        AND EXISTS (SELECT FROM messages x WHERE x.id = m.id AND x.id = ANY (p_message)
            AND x.id BETWEEN v_first AND v_last AND x.project_id = p_project);
    SELECT array_agg(d.id) INTO v_held FROM unnest(v_held) AS d(id)
    WHERE message_of(d.id) = ANY (v_gone);

    -- `scheduled` first: this waits for a sweeper that is moving a row from there to `due`, and the
    -- next statement then sees where it went.
    DELETE FROM scheduled s WHERE s.delivery_id = ANY (v_held);
    DELETE FROM due q WHERE q.delivery_id = ANY (v_held);
    DELETE FROM attempts a
        WHERE a.delivery_id = ANY (v_held) AND a.delivery_id BETWEEN v_first AND v_last;
    DELETE FROM deliveries d WHERE d.id = ANY (v_held) AND d.id BETWEEN v_first AND v_last;
    DELETE FROM attachments a
        WHERE a.message_id = ANY (v_gone) AND a.message_id BETWEEN v_first AND v_last;
    DELETE FROM messages m WHERE m.id = ANY (v_gone) AND m.id BETWEEN v_first AND v_last;
    v_count := coalesce(cardinality(v_gone), 0);
    IF v_count > 0 THEN
        PERFORM pg_advisory_xact_lock(1835466752 + p_lane);
        INSERT INTO events (lane, seq, project_id, kind, occurred_at, actor, payload)
        VALUES (p_lane, nextval('feed_seq'), p_project, 18, clock_timestamp(), p_actor,
            jsonb_build_object('filter', p_filter, 'count', v_count));
    END IF;
    RETURN QUERY SELECT v_count, coalesce(cardinality(v_sending), 0);
END $$;

CREATE OR REPLACE FUNCTION record_outcomes(
    p_lane integer, p_id uuid[], p_attempt uuid[], p_number integer[], p_call uuid[],
    p_channel text[], p_provider text[], p_started_at timestamptz[], p_ended_at timestamptz[],
    p_outcome smallint[], p_cause smallint[], p_status_code integer[], p_enhanced_code text[],
    p_text text[], p_provider_message_id text[], p_retry_after_ms integer[],
    p_state smallint[], p_possibly_sent boolean[], p_due_at timestamptz[], p_wait_reason smallint[],
    p_spares boolean[], p_late_state smallint[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_mergejoin = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_first uuid := first_of(p_id);
    v_last uuid := last_of(p_id);
    v_here uuid[];
    v_news uuid[];
    v_rows deliveries[];
    v_late deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    SELECT array_agg(d.id) INTO v_here FROM (SELECT d.id FROM deliveries d
        WHERE d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last ORDER BY d.id FOR UPDATE) AS d;

    WITH written AS (
        INSERT INTO attempts AS a (delivery_id, number, id, call_id, channel, provider, started_at,
            ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id,
            retry_after_ms)
        SELECT r.* FROM unnest(p_id, p_number, p_attempt, p_call, p_channel, p_provider,
                p_started_at, p_ended_at, p_outcome, p_cause, p_status_code, p_enhanced_code,
                p_text, p_provider_message_id, p_retry_after_ms) AS r(delivery_id)
        WHERE cardinality(v_here) = cardinality(p_id) OR r.delivery_id = ANY (v_here)  -- else it was cleared
        ON CONFLICT (delivery_id, number) DO UPDATE SET
            provider = excluded.provider, ended_at = excluded.ended_at, outcome = excluded.outcome,
            cause = excluded.cause, status_code = excluded.status_code,
            enhanced_code = excluded.enhanced_code, text = excluded.text,
            provider_message_id = excluded.provider_message_id,
            retry_after_ms = excluded.retry_after_ms
            WHERE a.id = excluded.id AND a.outcome = 4
        RETURNING a.delivery_id
    )
    SELECT array_agg(w.delivery_id) INTO v_news FROM written w;

    WITH moved AS (
        UPDATE deliveries d SET state = r.state, state_since = v_now, version = d.version + 1,
            possibly_sent = r.possibly_sent, due_at = r.due_at, wait_reason = r.wait_reason,
            attempt_id = NULL, forced = d.forced AND r.spares, spared = d.spared + r.spares::integer
        FROM unnest(p_id, p_attempt, p_state, p_possibly_sent, p_due_at, p_wait_reason, p_spares)
            AS r(id, attempt_id, state, possibly_sent, due_at, wait_reason, spares)
        WHERE d.id = r.id AND d.id = ANY (p_id) AND d.id BETWEEN v_first AND v_last
            AND d.state = 2 AND d.attempt_id = r.attempt_id
        RETURNING d.*
    )
    SELECT array_agg(ROW(m.*)::deliveries ORDER BY m.id) INTO v_rows FROM moved m;

    IF coalesce(cardinality(v_rows), 0) < cardinality(p_id) THEN
        WITH held AS MATERIALIZED (
            SELECT d.id, d.state AS old_state, r.state, r.number,
                CASE WHEN r.outcome = 1 THEN d.possibly_sent ELSE v.may_have_left END AS possibly_sent
            FROM deliveries d
            JOIN unnest(p_id, p_number, p_outcome, p_late_state) AS r(id, number, outcome, state)
                ON r.id = d.id
            CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM attempts a WHERE a.delivery_id = d.id
                AND a.delivery_id BETWEEN v_first AND v_last AND a.number <> r.number AND a.outcome IN (1, 4)) AS may_have_left) AS v
            WHERE d.id = ANY (v_news) AND d.id BETWEEN v_first AND v_last
                AND d.state = ANY (p_without_proof)
                AND d.attempt_count <= r.number AND r.state IS NOT NULL
                AND (r.outcome <> 2 OR (d.state = 9 AND NOT v.may_have_left))
                AND d.id NOT IN (SELECT m.id FROM unnest(v_rows) AS m)
        ), moved AS (
            UPDATE deliveries d SET state = h.state, state_since = v_now, version = d.version + 1,
                due_at = NULL, wait_reason = 0, forced = false, attempt_count = h.number,
                possibly_sent = h.possibly_sent
            FROM held h WHERE d.id = h.id AND d.id = ANY (v_news) AND d.id BETWEEN v_first AND v_last
            RETURNING d AS row, h.old_state
        )
        SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
        INTO v_late, v_old FROM moved m;
        DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT l.id FROM unnest(v_late) AS l);
    END IF;

    PERFORM settle_due(v_now, v_rows || v_late);
    PERFORM append_events(p_lane, v_rows || v_late,
        array_fill(2::smallint, ARRAY[coalesce(cardinality(v_rows), 0)]) || v_old, '',
        v_first, v_last);
END $$;

-- Make one more range ahead, of so many days. Whether it did; not when p_ahead is reached, or when
-- somebody is in the way: the locks are waited for briefly, so that nobody queues up behind them.
--
-- Where no worker made any for so long that the present lies behind the last range, rows have
-- fallen into the net. The net itself then becomes the range of that time, and a new one is hung
-- up: nothing is copied but what a clock that was ahead put there.
CREATE FUNCTION make_day(
    p_width integer, p_ahead interval, p_now timestamptz DEFAULT clock_timestamp()
) RETURNS boolean LANGUAGE plpgsql
SECURITY DEFINER SET search_path = mailgrpc, pg_temp SET lock_timeout = '50ms'
AS $$
DECLARE
    v_from  timestamptz;
    v_until timestamptz;
    v_table text;
    v_key   text;
    v_late  boolean;
    v_name  text;
    v_bound text;
BEGIN
    SELECT max(until) INTO v_from FROM days;
    IF v_from >= p_now + p_ahead THEN RETURN false; END IF;
    LOCK TABLE days IN SHARE ROW EXCLUSIVE MODE;
    SELECT max(until) INTO v_from FROM days;
    IF v_from >= p_now + p_ahead THEN RETURN false; END IF;
    v_late := v_from < p_now + interval '1 hour';
    v_until := CASE WHEN v_late THEN date_trunc('day', p_now, 'UTC') + interval '2 days'
        ELSE v_from + make_interval(days => p_width) END;
    v_name := to_char(v_from AT TIME ZONE 'UTC', '"d"YYYYMMDD');
    v_bound := format('FOR VALUES FROM (%L) TO (%L)', first_id_at(v_from), first_id_at(v_until));
    FOR v_table, v_key IN VALUES ('messages', 'id'), ('deliveries', 'id'),
        ('attempts', 'delivery_id'), ('attachments', 'message_id')
    LOOP
        IF v_late THEN
            EXECUTE format('ALTER TABLE %1$I DETACH PARTITION %1$s_net', v_table);
            EXECUTE format('ALTER TABLE %1$s_net RENAME TO %1$s_%2$s', v_table, v_name);
            PERFORM hang_net(v_table);
            EXECUTE format('WITH ahead AS (DELETE FROM %1$s_%2$s WHERE %3$I >= %4$L OR %3$I < %5$L
                RETURNING *) INSERT INTO %1$I SELECT * FROM ahead',
                v_table, v_name, v_key, first_id_at(v_until), first_id_at(v_from));
        ELSE
            EXECUTE format('CREATE TABLE %1$s_%2$s (LIKE %1$I INCLUDING ALL)', v_table, v_name);
            PERFORM tune_part(v_table, v_name);
            EXECUTE format('WITH ours AS (DELETE FROM %1$s_net WHERE %3$I >= %4$L AND %3$I < %5$L
                RETURNING *) INSERT INTO %1$s_%2$s SELECT * FROM ours',
                v_table, v_name, v_key, first_id_at(v_from), first_id_at(v_until));
        END IF;
        EXECUTE format('ALTER TABLE %1$I ATTACH PARTITION %1$s_%2$s %3$s', v_table, v_name, v_bound);
    END LOOP;
    INSERT INTO days (name, first_id, until_id, since, until)
    VALUES (v_name, first_id_at(v_from), first_id_at(v_until), v_from, v_until);
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected OR check_violation THEN
    RETURN false;  -- a check: something has just fallen into the net that belongs into the range
END $$;

-- Drop a range whose end is p_days old, with all that is in it, and tell every project's watchers.
-- Answers 'dropped'; 'kept': something in it waits or is being sent, or may have until a day ago;
-- 'busy': somebody is in the way; 'gone': no such range, or not old enough.
--
-- All that lives has its row in `due` or `scheduled`, so a look at two indexes says whether anything
-- does. The locks are waited for briefly, and held for some milliseconds, whatever is in the range:
-- its files are removed after the commit. What is moved by others cannot move while they are held,
-- so the second look is the last word. The range is looked at from a day before its time on: what
-- its caller's request_id is promised, a day after the end, holds for its rows too.
--
-- created_at is the database's clock and the ids are a server's: the filter that is told reaches a
-- minute further (core/event.py, CLOCK_SLACK).
CREATE FUNCTION drop_day(
    p_lane integer, p_name text, p_days integer, p_now timestamptz DEFAULT clock_timestamp()
) RETURNS text LANGUAGE plpgsql
SECURITY DEFINER SET search_path = mailgrpc, pg_temp SET lock_timeout = '50ms'
SET enable_seqscan = off
AS $$
DECLARE
    v_day   days;
    v_lives boolean;
    v_table text;
BEGIN
    SELECT d.* INTO v_day FROM days d WHERE d.name = p_name
        AND d.until <= p_now - make_interval(days => p_days - 1) FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN RETURN 'gone'; END IF;
    v_lives := something_lives(v_day.first_id, v_day.until_id);
    IF v_lives OR v_day.quiet_since IS NULL THEN
        UPDATE days SET quiet_since = CASE WHEN NOT v_lives THEN p_now END WHERE name = p_name
            AND (v_lives = (quiet_since IS NOT NULL) OR NOT v_lives);
        RETURN 'kept';
    END IF;
    IF v_day.quiet_since > p_now - interval '1 day'
        OR v_day.until > p_now - make_interval(days => p_days) THEN RETURN 'kept'; END IF;

    LOCK TABLE ONLY messages, ONLY deliveries, ONLY attempts, ONLY attachments
        IN ACCESS EXCLUSIVE MODE;
    IF something_lives(v_day.first_id, v_day.until_id) THEN
        UPDATE days SET quiet_since = NULL WHERE name = p_name;
        RETURN 'kept';
    END IF;
    FOREACH v_table IN ARRAY ARRAY['messages', 'deliveries', 'attempts', 'attachments'] LOOP
        EXECUTE format('DROP TABLE %s_%s', v_table, p_name);
    END LOOP;
    DELETE FROM days WHERE name = p_name;
    PERFORM pg_advisory_xact_lock(1835466752 + p_lane);
    INSERT INTO events (lane, seq, project_id, kind, occurred_at, actor, payload)
    SELECT p_lane, nextval('feed_seq'), p.id, 18, clock_timestamp(), '',
        jsonb_build_object('count', 0, 'filter', jsonb_strip_nulls(jsonb_build_object(
            'createdAfter', in_json(v_day.since - interval '1 minute'),
            'createdBefore', in_json(v_day.until + interval '1 minute'))))
    FROM projects p;
    RETURN 'dropped';
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN 'busy';
END $$;

CREATE FUNCTION something_lives(p_first uuid, p_until uuid) RETURNS boolean LANGUAGE sql
SET enable_seqscan = off
AS $$
    SELECT EXISTS (SELECT FROM due WHERE delivery_id >= p_first AND delivery_id < p_until)
        OR EXISTS (SELECT FROM scheduled WHERE delivery_id >= p_first AND delivery_id < p_until)
$$;

-- As ProtoJSON writes it.
CREATE FUNCTION in_json(p_moment timestamptz) RETURNS text LANGUAGE sql STABLE
AS $$ SELECT to_char(p_moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') $$;

-- What is written and deleted all the time is cleaned before it grows; each of these is small, or
-- grows by keys that lie anywhere, where a fifth of the table is too much to wait for.
ALTER TABLE due SET (autovacuum_vacuum_cost_delay = 0);
ALTER TABLE scheduled SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
ALTER TABLE workers SET (autovacuum_vacuum_cost_delay = 0);
ALTER TABLE request_ids SET (autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE events SET (autovacuum_vacuum_scale_factor = 0.05);
