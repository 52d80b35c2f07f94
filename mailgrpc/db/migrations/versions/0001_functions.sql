-- The hot writes, each ONE autocommit round trip. Order of locks in all of them: request ids →
-- due → deliveries by id → the feed's lane, which is taken last and held only until the commit
-- that follows at once. A client never holds it.
--
-- The planner is told not to scan: these run from the first row on, before any statistics exist,
-- and a plan that was cached over an empty table would read a full one.

-- The message of a delivery: its id with the last 16 bits cleared (core/ids.py).
CREATE FUNCTION message_of(p_delivery uuid) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT overlay(p_delivery::text PLACING '0000' FROM 33)::uuid $$;

-- Append one STATE_CHANGED event for each of `p_moved`, which were in `p_old` before (0: new).
CREATE FUNCTION append_events(
    p_lane integer, p_moved deliveries[], p_old smallint[], p_actor text
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
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
    LEFT JOIN attempts a ON a.delivery_id = d.id AND a.number = d.attempt_count;
END $$;

-- Take in a flush: messages, request ids, deliveries, due rows and QUEUED events.
--
-- Parallel arrays: p_m_* one entry a message, p_a_* one an attachment, p_d_* one a delivery, whose
-- p_d_message is the index of its message. Answers only what is not plain, so nothing for most:
--   what = 'known'       message_id lost to an earlier request with its request_id
--   what = 'suppressed'  delivery_id was not queued, with reason and duplicate_of
-- Running it again with the same ids, after a commit whose answer was lost, adds nothing: the
-- insert waits on the key of the first run and 'known' then names our own message.
CREATE FUNCTION enqueue_messages(
    p_lane integer,
    p_m_id uuid[], p_m_project integer[], p_m_request_id text[], p_m_fingerprint bytea[],
    p_m_rule integer, p_m_correlation text[], p_m_subject text[], p_m_tags jsonb[],
    p_m_args jsonb[], p_m_options jsonb[], p_m_flags integer[], p_m_content bytea[],
    p_m_channel text[], p_m_priority smallint[], p_m_mode smallint[],
    p_m_send_at timestamptz[], p_m_expire_at timestamptz[], p_m_dedupe_s double precision[],
    p_a_message uuid[], p_a_position smallint[], p_a_data bytea[],
    p_d_message integer[], p_d_id uuid[], p_d_recipient text[], p_d_role smallint[],
    p_d_dedupe_key bytea[]
) RETURNS TABLE (what text, message_id uuid, delivery_id uuid, reason smallint, duplicate_of uuid)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_lost uuid[];
    v_duplicate_of uuid[];
    v_rows deliveries[];
BEGIN
    -- In the order of the key, so that two flushes with the same ids wait and never deadlock.
    WITH asked AS (
        SELECT * FROM unnest(p_m_id, p_m_project, p_m_request_id, p_m_fingerprint)
            AS m(id, project_id, request_id, fingerprint)
        WHERE request_id <> '' ORDER BY project_id, request_id
    ), won AS (
        INSERT INTO request_ids AS r
            (project_id, request_id, kind, message_id, fingerprint, rule, created_at)
        SELECT project_id, request_id, 1, id, fingerprint, p_m_rule, v_now FROM asked
        ON CONFLICT DO NOTHING RETURNING r.message_id
    )
    SELECT array_agg(id) INTO v_lost FROM asked WHERE id NOT IN (SELECT w.message_id FROM won w);

    INSERT INTO messages (id, project_id, created_at, request_id, correlation_id, subject, tags,
        custom_args, options, flags, content)
    SELECT m.id, m.project_id, v_now, m.request_id, m.correlation_id, m.subject, m.tags, m.args,
        m.options, m.flags, m.content
    FROM unnest(p_m_id, p_m_project, p_m_request_id, p_m_correlation, p_m_subject, p_m_tags,
        p_m_args, p_m_options, p_m_flags, p_m_content)
        AS m(id, project_id, request_id, correlation_id, subject, tags, args, options, flags, content)
    WHERE v_lost IS NULL OR m.id <> ALL (v_lost)
    ON CONFLICT DO NOTHING;

    IF cardinality(p_a_message) > 0 THEN
        INSERT INTO attachments (message_id, position, data)
        SELECT a.* FROM unnest(p_a_message, p_a_position, p_a_data) AS a(message_id, position, data)
        WHERE v_lost IS NULL OR a.message_id <> ALL (v_lost)
        ON CONFLICT DO NOTHING;
    END IF;

    IF EXISTS (SELECT FROM unnest(p_m_dedupe_s) AS s WHERE s > 0) THEN
        v_duplicate_of := claim_content(v_now, v_lost, p_m_id, p_m_project, p_m_flags,
            p_m_dedupe_s, p_d_message, p_d_recipient, p_d_dedupe_key);
    END IF;

    WITH inserted AS (
        INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode, flags,
            state, state_since, version, wait_reason, due_at, expire_at, suppression_reason,
            duplicate_of)
        SELECT d.id, m.project_id, d.recipient, d.role, m.channel, m.priority, m.mode, m.flags,
            CASE WHEN v.reason > 0 THEN 10 ELSE 1 END, v_now, 1,
            CASE WHEN v.reason > 0 THEN 0 WHEN m.send_at > v_now THEN 2 ELSE 1 END,
            CASE WHEN v.reason > 0 THEN NULL ELSE greatest(m.send_at, v_now) END,
            m.expire_at, v.reason, v_duplicate_of[d.n]
        FROM unnest(p_d_message, p_d_id, p_d_recipient, p_d_role) WITH ORDINALITY
            AS d(m, id, recipient, role, n)
        CROSS JOIN LATERAL (SELECT p_m_id[d.m] AS id, p_m_project[d.m] AS project_id,
            p_m_channel[d.m] AS channel, p_m_priority[d.m] AS priority, p_m_mode[d.m] AS mode,
            p_m_flags[d.m] AS flags, p_m_send_at[d.m] AS send_at,
            p_m_expire_at[d.m] AS expire_at) AS m
        LEFT JOIN preferences p ON p.project_id = m.project_id AND p.address = d.recipient
        LEFT JOIN suppressions s ON s.project_id = m.project_id AND s.address = d.recipient
        CROSS JOIN LATERAL (SELECT (CASE WHEN v_duplicate_of[d.n] IS NOT NULL THEN 7
            WHEN s.reason IS NOT NULL THEN s.reason
            WHEN p.blocked_flags & m.flags & ~1 <> 0 THEN 1 ELSE 0 END)::smallint AS reason) AS v
        WHERE v_lost IS NULL OR m.id <> ALL (v_lost)
        ON CONFLICT DO NOTHING RETURNING deliveries.*
    ), queued AS (
        INSERT INTO due (delivery_id, channel, project_id, priority, due_at)
        SELECT id, channel, project_id, priority, due_at FROM inserted
        WHERE state = 1 AND due_at <= v_now + interval '10 minutes'
    ), put_off AS (
        INSERT INTO scheduled (delivery_id, channel, project_id, priority, due_at)
        SELECT id, channel, project_id, priority, due_at FROM inserted
        WHERE state = 1 AND due_at > v_now + interval '10 minutes'
    )
    SELECT array_agg(ROW(inserted.*)::deliveries) INTO v_rows FROM inserted;

    PERFORM append_events(p_lane, v_rows, array_fill(0::smallint, ARRAY[coalesce(cardinality(v_rows), 0)]), '');

    RETURN QUERY SELECT 'known', l.id, NULL::uuid, NULL::smallint, NULL::uuid
        FROM unnest(v_lost) AS l(id);
    RETURN QUERY SELECT 'suppressed', message_of(r.id), r.id, r.suppression_reason, r.duplicate_of
        FROM unnest(v_rows) AS r WHERE r.state = 10;
END $$;

-- For each delivery of a flush, the message that told the same recipient the same content within
-- the window; NULL where none did, and then this one is remembered.
CREATE FUNCTION claim_content(
    p_now timestamptz, p_lost uuid[], p_m_id uuid[], p_m_project integer[], p_m_flags integer[],
    p_m_dedupe_s double precision[], p_d_message integer[], p_d_recipient text[], p_d_key bytea[]
) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    v_duplicate_of uuid[];
BEGIN
    WITH asked AS (
        SELECT d.n, d.key, p_m_project[d.m] AS project_id, p_m_id[d.m] AS message_id,
            p_now - make_interval(secs => p_m_dedupe_s[d.m]) AS since,
            p_now + make_interval(secs => p_m_dedupe_s[d.m]) AS until,
            row_number() OVER (PARTITION BY p_m_project[d.m], d.key ORDER BY d.n) AS nth,
            first_value(p_m_id[d.m]) OVER (PARTITION BY p_m_project[d.m], d.key ORDER BY d.n)
                AS first_message_id
        FROM unnest(p_d_message, p_d_key) WITH ORDINALITY AS d(m, key, n)
        WHERE p_m_dedupe_s[d.m] > 0 AND (p_lost IS NULL OR p_m_id[d.m] <> ALL (p_lost))
            -- Who refuses it is not told it, so nothing later is a duplicate of it.
            AND NOT EXISTS (SELECT FROM suppressions s
                WHERE s.project_id = p_m_project[d.m] AND s.address = p_d_recipient[d.n])
            AND NOT EXISTS (SELECT FROM preferences p
                WHERE p.project_id = p_m_project[d.m] AND p.address = p_d_recipient[d.n]
                    AND p.blocked_flags & p_m_flags[d.m] & ~1 <> 0)
    ), won AS (
        -- The window is the newcomer's: an older entry within it wins.
        INSERT INTO recent_content AS c (project_id, key, message_id, accepted_at, keep_until)
        SELECT project_id, key, message_id, p_now, until FROM asked
        WHERE nth = 1 ORDER BY project_id, key
        ON CONFLICT (project_id, key) DO UPDATE SET
            message_id = CASE WHEN c.accepted_at < p_now - (excluded.keep_until - p_now)
                THEN excluded.message_id ELSE c.message_id END,
            accepted_at = CASE WHEN c.accepted_at < p_now - (excluded.keep_until - p_now)
                THEN excluded.accepted_at ELSE c.accepted_at END,
            keep_until = greatest(c.keep_until, excluded.keep_until)
        RETURNING c.project_id, c.key, c.message_id
    )
    SELECT array_agg(CASE WHEN w.message_id <> a.message_id THEN w.message_id END ORDER BY d.n)
    INTO v_duplicate_of
    FROM generate_subscripts(p_d_key, 1) AS d(n)
    LEFT JOIN asked a ON a.n = d.n
    LEFT JOIN won w ON w.project_id = a.project_id AND w.key = a.key;
    RETURN v_duplicate_of;
END $$;

-- Lease up to p_limit due deliveries of a channel to a session. Changes no state.
--
-- Projects take turns, from the one after p_after_project on, each with an equal share of the
-- batch; within a project the higher priority goes first. Each range is read along the index, so
-- the cost does not depend on what waits elsewhere. Where nothing was due, one row without
-- delivery_id says in how many seconds something will be, by this server's clock (NULL: nothing
-- is waiting).
CREATE FUNCTION claim_due(
    p_session bigint, p_channel text, p_limit integer, p_after_project integer
) RETURNS TABLE (
    delivery_id uuid, project_id integer, claims smallint, next_due_in_s double precision
) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now      timestamptz := clock_timestamp();
    v_projects integer[];
    v_next     timestamptz;
    v_project  integer;
    v_priority smallint;
    v_left     integer := p_limit;
    v_share    integer;
    v_got      integer;
BEGIN
    -- Shared with other claims and starts, exclusive of the reaper: who got here is not ended
    -- before this transaction is, and its claims are then seen by the reaper.
    PERFORM FROM workers w WHERE w.id = p_session AND w.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'worker session % has ended', p_session USING ERRCODE = 'MG001';
    END IF;

    SELECT p.ready, p.next_due_at INTO v_projects, v_next
    FROM projects_with_due(p_channel, p_after_project, 64, v_now) p;
    FOREACH v_project IN ARRAY v_projects LOOP
        v_share := least(v_left, ceil(p_limit::numeric / cardinality(v_projects))::integer);
        FOREACH v_priority IN ARRAY ARRAY[40, 30, 20, 10]::smallint[] LOOP
            EXIT WHEN v_share <= 0;
            RETURN QUERY
            WITH picked AS MATERIALIZED (
                SELECT d.delivery_id FROM due d
                WHERE d.channel = p_channel AND d.project_id = v_project
                    AND d.priority = v_priority AND d.due_at <= v_now AND d.session_id IS NULL
                ORDER BY d.due_at, d.delivery_id LIMIT v_share
                FOR UPDATE SKIP LOCKED
            )
            UPDATE due d SET session_id = p_session, claims = d.claims + 1
            FROM picked p WHERE d.delivery_id = p.delivery_id
            RETURNING d.delivery_id, d.project_id, d.claims, NULL::double precision;
            GET DIAGNOSTICS v_got = ROW_COUNT;
            v_share := v_share - v_got;
            v_left := v_left - v_got;
        END LOOP;
        EXIT WHEN v_left <= 0;
    END LOOP;
    IF v_left = p_limit THEN
        RETURN QUERY SELECT NULL::uuid, NULL::integer, NULL::smallint,
            extract(epoch FROM v_next - v_now)::double precision;
    END IF;
END $$;

-- The first p_most projects with something unclaimed that is due by p_now on a channel, in turn
-- from the one after p_after on; and when the next thing is due in the projects passed over. Four
-- short reads along the index for each, however many rows it has.
CREATE FUNCTION projects_with_due(
    p_channel text, p_after integer, p_most integer, p_now timestamptz,
    OUT ready integer[], OUT next_due_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off
AS $$
DECLARE
    v_project integer := p_after;
    v_wrapped boolean := false;
    v_first   timestamptz;
BEGIN
    ready := '{}';
    WHILE cardinality(ready) < p_most LOOP
        SELECT d.project_id INTO v_project FROM due d
        WHERE d.channel = p_channel AND d.project_id > v_project
        ORDER BY d.project_id LIMIT 1;
        IF v_project IS NULL THEN
            EXIT WHEN v_wrapped;
            v_wrapped := true;
            v_project := -1;
            CONTINUE;
        END IF;
        EXIT WHEN v_wrapped AND v_project > p_after;
        SELECT min(x.due_at) INTO v_first
        FROM unnest(ARRAY[40, 30, 20, 10]::smallint[]) AS p(priority)
        CROSS JOIN LATERAL (SELECT d.due_at FROM due d
            WHERE d.channel = p_channel AND d.project_id = v_project
                AND d.priority = p.priority AND d.session_id IS NULL
            ORDER BY d.due_at LIMIT 1) AS x;
        IF v_first <= p_now THEN
            ready := ready || v_project;
        ELSE
            next_due_at := least(next_due_at, v_first);
        END IF;
    END LOOP;
END $$;

-- The guarded step to SENDING. Re-reads lease, state, expiry, suppression and preference; only
-- what it returns may be sent. The rest of p_id went to SUPPRESSED or EXPIRED, or was not ours.
-- Running it again with the same attempts, after a commit whose answer was lost, starts nothing
-- twice and answers what the first run started.
CREATE FUNCTION start_deliveries(
    p_session bigint, p_lane integer, p_id uuid[], p_attempt uuid[], p_call uuid[]
) RETURNS SETOF deliveries LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_mine uuid[];
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
        WHERE d.id = ANY (v_mine) AND d.state IN (1, 3) ORDER BY d.id FOR UPDATE
    ), verdict AS (
        SELECT d.id, d.state AS old_state, a.attempt_id, a.call_id, v.reason,
            CASE WHEN d.expire_at <= v_now THEN 12 WHEN v.reason > 0 THEN 10 ELSE 2 END AS state
        FROM held d
        JOIN unnest(p_id, p_attempt, p_call) AS a(id, attempt_id, call_id) ON a.id = d.id
        LEFT JOIN preferences p ON p.project_id = d.project_id AND p.address = d.recipient
        LEFT JOIN suppressions s ON s.project_id = d.project_id AND s.address = d.recipient
        CROSS JOIN LATERAL (SELECT (CASE WHEN s.reason IS NOT NULL THEN s.reason
            WHEN p.blocked_flags & d.flags & ~1 <> 0 THEN 1 ELSE 0 END)::smallint AS reason) AS v
    ), moved AS (
        UPDATE deliveries d SET state = v.state, state_since = v_now, version = d.version + 1,
            wait_reason = 0, due_at = NULL,
            suppression_reason = CASE WHEN v.state = 10 THEN v.reason ELSE 0 END,
            attempt_count = d.attempt_count + (v.state = 2)::integer,
            attempt_id = CASE WHEN v.state = 2 THEN v.attempt_id END,
            call_id = CASE WHEN v.state = 2 THEN v.call_id ELSE d.call_id END,
            attempt_started_at = CASE WHEN v.state = 2 THEN v_now ELSE d.attempt_started_at END
        FROM verdict v WHERE d.id = v.id
        RETURNING d AS row, v.old_state
    )
    SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
    INTO v_rows, v_old FROM moved m;

    -- A due row whose delivery is not SENDING has no business here any more.
    DELETE FROM due q WHERE q.delivery_id = ANY (v_mine)
        AND NOT EXISTS (SELECT FROM deliveries d WHERE d.id = q.delivery_id AND d.state = 2);
    PERFORM append_events(p_lane, v_rows, v_old, '');
    RETURN QUERY SELECT d.* FROM unnest(p_id, p_attempt) AS a(id, attempt_id)
        JOIN deliveries d ON d.id = a.id AND d.attempt_id = a.attempt_id
        WHERE a.id = ANY (v_mine) ORDER BY d.id;
END $$;

-- Write what attempts came to: each to its attempt always, and to its delivery
--   where that attempt is the one that is running: the state in p_state;
--   where it was taken for lost and is still the last one started, the result is news to it, and
--   the state is one of p_without_proof: the state in p_late_state (NULL: none).
-- "News": the attempt had no row, or an UNKNOWN one. So running it again after a commit whose
-- answer was lost moves nothing a second time, not even when Resend has moved it since.
CREATE FUNCTION record_outcomes(
    p_lane integer, p_id uuid[], p_attempt uuid[], p_number integer[], p_call uuid[],
    p_channel text[], p_provider text[], p_started_at timestamptz[], p_ended_at timestamptz[],
    p_outcome smallint[], p_cause smallint[], p_status_code integer[], p_enhanced_code text[],
    p_text text[], p_provider_message_id text[], p_retry_after_ms integer[],
    p_state smallint[], p_possibly_sent boolean[], p_due_at timestamptz[], p_wait_reason smallint[],
    p_late_state smallint[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_news uuid[];
    v_rows deliveries[];
    v_late deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    PERFORM FROM deliveries d WHERE d.id = ANY (p_id) ORDER BY d.id FOR UPDATE;

    WITH written AS (
        INSERT INTO attempts AS a (delivery_id, number, id, call_id, channel, provider, started_at,
            ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id,
            retry_after_ms)
        SELECT r.* FROM unnest(p_id, p_number, p_attempt, p_call, p_channel, p_provider,
                p_started_at, p_ended_at, p_outcome, p_cause, p_status_code, p_enhanced_code,
                p_text, p_provider_message_id, p_retry_after_ms) AS r(delivery_id)
        WHERE EXISTS (SELECT FROM deliveries d WHERE d.id = r.delivery_id)  -- else it was cleared
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
            attempt_id = NULL, forced = false
        FROM unnest(p_id, p_attempt, p_state, p_possibly_sent, p_due_at, p_wait_reason)
            AS r(id, attempt_id, state, possibly_sent, due_at, wait_reason)
        WHERE d.id = r.id AND d.state = 2 AND d.attempt_id = r.attempt_id
        RETURNING d.*
    )
    SELECT array_agg(ROW(m.*)::deliveries ORDER BY m.id) INTO v_rows FROM moved m;

    IF coalesce(cardinality(v_rows), 0) < cardinality(p_id) THEN
        WITH held AS MATERIALIZED (
            SELECT d.id, d.state AS old_state, r.state FROM deliveries d
            JOIN unnest(p_id, p_number, p_late_state) AS r(id, number, state) ON r.id = d.id
            WHERE d.id = ANY (v_news) AND d.state = ANY (p_without_proof)
                AND d.attempt_count = r.number AND r.state IS NOT NULL
                AND d.id NOT IN (SELECT m.id FROM unnest(v_rows) AS m)
        ), moved AS (
            UPDATE deliveries d SET state = h.state, state_since = v_now, version = d.version + 1,
                due_at = NULL, wait_reason = 0, forced = false
            FROM held h WHERE d.id = h.id
            RETURNING d AS row, h.old_state
        )
        SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
        INTO v_late, v_old FROM moved m;
        DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT l.id FROM unnest(v_late) AS l);
    END IF;

    PERFORM settle_due(v_now, v_rows || v_late);
    PERFORM append_events(p_lane, v_rows || v_late,
        array_fill(2::smallint, ARRAY[coalesce(cardinality(v_rows), 0)]) || v_old, '');
END $$;

-- Make `due` and `scheduled` say what these deliveries say: waiting ones are in the one that fits
-- their due_at, unclaimed; all others are in neither. Their rows in `due` are locked already.
CREATE FUNCTION settle_due(p_now timestamptz, p_rows deliveries[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
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

-- Move deliveries that are not SENDING: Resend, later also cancel and feedback. Each
-- moves only from the version its step was decided on; answers the ids that did move.
CREATE FUNCTION move_deliveries(
    p_lane integer, p_actor text, p_id uuid[], p_version integer[], p_state smallint[],
    p_due_at timestamptz[], p_wait_reason smallint[], p_forced boolean[],
    p_possibly_sent boolean[], p_expire_at timestamptz[]
) RETURNS SETOF deliveries LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_rows deliveries[];
    v_old  smallint[];
BEGIN
    PERFORM FROM due q WHERE q.delivery_id = ANY (p_id) ORDER BY q.delivery_id FOR UPDATE;
    WITH held AS MATERIALIZED (
        SELECT d.id, d.state FROM deliveries d WHERE d.id = ANY (p_id) ORDER BY d.id FOR UPDATE
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
        WHERE d.id = h.id AND d.version = r.version AND d.state <> 2
        RETURNING d AS row, h.state AS old_state
    )
    SELECT array_agg(m.row ORDER BY (m.row).id), array_agg(m.old_state ORDER BY (m.row).id)
    INTO v_rows, v_old FROM moved m;
    DELETE FROM scheduled s WHERE s.delivery_id IN (SELECT r.id FROM unnest(v_rows) AS r);
    PERFORM settle_due(v_now, v_rows);
    PERFORM append_events(p_lane, v_rows, v_old, p_actor);
    RETURN QUERY SELECT * FROM unnest(v_rows);
END $$;

-- Resend: remember the request and move its deliveries, all or none. SQLSTATE MG002: a delivery
-- changed since the steps were decided, decide again. Answers nothing moved when the request_id
-- was known already.
CREATE FUNCTION resend_deliveries(
    p_lane integer, p_actor text, p_project integer, p_request_id text, p_message uuid,
    p_fingerprint bytea, p_rule integer, p_response jsonb,
    p_id uuid[], p_version integer[], p_due_at timestamptz[], p_forced boolean[],
    p_possibly_sent boolean[], p_expire_at timestamptz[]
) RETURNS TABLE (won boolean) LANGUAGE plpgsql AS $$
DECLARE
    v_moved integer;
    v_n     integer := cardinality(p_id);
BEGIN
    IF p_request_id <> '' THEN
        INSERT INTO request_ids (project_id, request_id, kind, message_id, fingerprint, rule,
            response, created_at)
        VALUES (p_project, p_request_id, 2, p_message, p_fingerprint, p_rule, p_response,
            clock_timestamp())
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN QUERY SELECT false;
            RETURN;
        END IF;
    END IF;
    IF v_n > 0 THEN
        SELECT count(*) INTO v_moved FROM move_deliveries(p_lane, p_actor, p_id, p_version,
            array_fill(1::smallint, ARRAY[v_n]), p_due_at, array_fill(1::smallint, ARRAY[v_n]),
            p_forced, p_possibly_sent, p_expire_at);
        IF v_moved < v_n THEN
            RAISE EXCEPTION 'a delivery changed meanwhile' USING ERRCODE = 'MG002';
        END IF;
    END IF;
    RETURN QUERY SELECT true;
END $$;

-- Remove messages with all that belongs to them, and tell every watcher. A message with a
-- delivery in SENDING is left alone, and without p_force any that has not ended. The request ids
-- stay. One transaction, so the caller bounds p_message (db/clear.py).
CREATE FUNCTION clear_messages(
    p_lane integer, p_actor text, p_project integer, p_message uuid[], p_force boolean,
    p_filter jsonb
) RETURNS TABLE (cleared integer, sending integer) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_id      uuid[];
    v_held    uuid[];
    v_sending uuid[];
    v_waiting uuid[];
    v_gone    uuid[];
    v_count   integer;
BEGIN
    SELECT array_agg(d.id ORDER BY d.id) INTO v_id
    FROM unnest(p_message) AS m(id)
    JOIN deliveries d ON d.id > m.id AND d.id < last_delivery_of(m.id) AND d.project_id = p_project;
    PERFORM FROM due q WHERE q.delivery_id = ANY (v_id) ORDER BY q.delivery_id FOR UPDATE;
    SELECT array_agg(d.id), array_agg(DISTINCT message_of(d.id)) FILTER (WHERE d.state = 2),
        array_agg(DISTINCT message_of(d.id)) FILTER (WHERE d.state IN (1, 3))
    INTO v_held, v_sending, v_waiting
    FROM (SELECT d.id, d.state FROM deliveries d WHERE d.id = ANY (v_id) ORDER BY d.id FOR UPDATE) d;

    SELECT array_agg(m.id) INTO v_gone FROM unnest(p_message) AS m(id)
    WHERE m.id <> ALL (coalesce(v_sending, '{}'))
        AND (p_force OR m.id <> ALL (coalesce(v_waiting, '{}')))
        AND EXISTS (SELECT FROM messages x WHERE x.id = m.id AND x.project_id = p_project);
    SELECT array_agg(d.id) INTO v_held FROM unnest(v_held) AS d(id)
    WHERE message_of(d.id) = ANY (v_gone);

    -- `scheduled` first: this waits for a sweeper that is moving a row from there to `due`, and the
    -- next statement then sees where it went.
    DELETE FROM scheduled s WHERE s.delivery_id = ANY (v_held);
    DELETE FROM due q WHERE q.delivery_id = ANY (v_held);
    DELETE FROM attempts a WHERE a.delivery_id = ANY (v_held);
    DELETE FROM deliveries d WHERE d.id = ANY (v_held);
    DELETE FROM attachments a WHERE a.message_id = ANY (v_gone);
    DELETE FROM messages m WHERE m.id = ANY (v_gone);
    v_count := coalesce(cardinality(v_gone), 0);
    IF v_count > 0 THEN
        PERFORM pg_advisory_xact_lock(1835466752 + p_lane);
        INSERT INTO events (lane, seq, project_id, kind, occurred_at, actor, payload)
        VALUES (p_lane, nextval('feed_seq'), p_project, 18, clock_timestamp(), p_actor,
            jsonb_build_object('filter', p_filter, 'count', v_count));
    END IF;
    RETURN QUERY SELECT v_count, coalesce(cardinality(v_sending), 0);
END $$;

-- The last id that a delivery of this message can have.
CREATE FUNCTION last_delivery_of(p_message uuid) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT overlay(p_message::text PLACING 'ffff' FROM 33)::uuid $$;
