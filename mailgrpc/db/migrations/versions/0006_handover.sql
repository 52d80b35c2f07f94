-- Handing over: a delivery that a worker has offered a place for is stored as started by it, in the
-- commit that takes it in (mailgrpc/handover.py).

DROP FUNCTION enqueue_messages(integer, uuid[], integer[], text[], bytea[], integer, text[], text[],
    jsonb[], jsonb[], jsonb[], integer[], bytea[], text[], smallint[], smallint[], timestamptz[],
    timestamptz[], double precision[], uuid[], smallint[], bytea[], integer[], uuid[], text[],
    smallint[], bytea[]);

-- Held to the end of the transaction: shared by the inserts that start in a session's name, alone by what
-- ends it or begins an epoch. It is given out in the order in which it is asked for. 0x6d670001: 'mg'.
CREATE FUNCTION lock_session(p_session bigint, p_alone boolean) RETURNS void LANGUAGE plpgsql
AS $$
BEGIN
    IF p_alone THEN
        PERFORM pg_advisory_xact_lock(1835466753, hashint8(p_session));
    ELSE
        PERFORM pg_advisory_xact_lock_shared(1835466753, hashint8(p_session));
    END IF;
END $$;

-- End a session; with p_seen_beat only if it has not beaten since. Whether it is ended now. Waits for the
-- claims, starts and inserts that are under way in it, and none follows.
CREATE FUNCTION end_session(p_session bigint, p_seen_beat bigint, p_settle_after_s double precision)
RETURNS boolean LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM lock_session(p_session, true);
    UPDATE workers SET ended_at = coalesce(ended_at,
        clock_timestamp() + make_interval(secs => p_settle_after_s))
    WHERE id = p_session AND (p_seen_beat IS NULL OR beat = p_seen_beat);
    RETURN FOUND;
END $$;

-- Beat, and let nothing of an earlier epoch on this channel take or start anything from now on. False:
-- the session has been ended. Waits for what is under way in it, as end_session does.
CREATE FUNCTION begin_epoch(
    p_session bigint, p_channel text, p_epoch integer, p_held text, p_paused text[]
) RETURNS boolean LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM lock_session(p_session, true);
    UPDATE workers SET beat = beat + 1, beat_at = clock_timestamp(), held = p_held,
        paused = p_paused, epochs = epochs || jsonb_build_object(p_channel,
            greatest(coalesce((epochs ->> p_channel)::integer, 0), p_epoch))
    WHERE id = p_session AND ended_at IS NULL;
    RETURN FOUND;
END $$;

-- Take in a flush: messages, request ids, deliveries, due rows and QUEUED events.
--
-- Parallel arrays: p_m_* one entry a message, p_a_* one an attachment, p_d_* one a delivery, whose
-- p_d_message is the index of its message. p_h_attempt is empty, or says for each message with which
-- attempt its one delivery is started (NULL: it is not) by session p_h_session, unless that has ended
-- or begun a later epoch than p_h_epoch on p_h_channel, which is theirs. Answers only what is not
-- plain, so nothing for most:
--   what = 'known'       message_id lost to an earlier request with its request_id
--   what = 'suppressed'  delivery_id was not queued, with reason and duplicate_of
--   what = 'unstarted'   nothing was started: the session has ended, or begun a later epoch
-- Running it again with the same ids, after a commit whose answer was lost, adds nothing: the
-- insert waits on the key of the first run and 'known' then names our own message.
--
-- Locks: request ids → the session → content keys → due → deliveries → the lane. The session is locked by
-- its number and not by its row: inserts of several servers overlap without an end, and a beat that had
-- to wait until nobody shares its row would wait for ever. Not before the request ids: whoever ends the
-- session lets nobody else in, and two flushes with one request id would then wait for each other.
CREATE FUNCTION enqueue_messages(
    p_lane integer,
    p_m_id uuid[], p_m_project integer[], p_m_request_id text[], p_m_fingerprint bytea[],
    p_m_rule integer, p_m_correlation text[], p_m_subject text[], p_m_tags jsonb[],
    p_m_args jsonb[], p_m_options jsonb[], p_m_flags integer[], p_m_content bytea[],
    p_m_channel text[], p_m_priority smallint[], p_m_mode smallint[],
    p_m_send_at timestamptz[], p_m_expire_at timestamptz[], p_m_dedupe_s double precision[],
    p_a_message uuid[], p_a_position smallint[], p_a_data bytea[],
    p_d_message integer[], p_d_id uuid[], p_d_recipient text[], p_d_role smallint[],
    p_d_dedupe_key bytea[],
    p_h_session bigint DEFAULT 0, p_h_epoch integer DEFAULT 0, p_h_channel text DEFAULT '',
    p_h_attempt uuid[] DEFAULT '{}'
) RETURNS TABLE (what text, message_id uuid, delivery_id uuid, reason smallint, duplicate_of uuid)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now  timestamptz := clock_timestamp();
    v_lost uuid[];
    v_duplicate_of uuid[];
    v_starts boolean := cardinality(p_h_attempt) > 0;
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

    -- A session that stands here is not ended before this commit, nor an epoch begun, and whoever does
    -- so then sees what is started in its name.
    IF v_starts THEN
        PERFORM lock_session(p_h_session, false);
        PERFORM FROM workers w WHERE w.id = p_h_session AND w.ended_at IS NULL
            AND p_h_channel = ANY (w.channels)
            AND coalesce((w.epochs ->> p_h_channel)::integer, 0) <= p_h_epoch;
        v_starts := FOUND;
    END IF;

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
            duplicate_of, attempt_count, attempt_id, call_id, attempt_started_at)
        SELECT d.id, m.project_id, d.recipient, d.role, m.channel, m.priority, m.mode, m.flags,
            v.state, v_now, CASE WHEN v.state = 2 THEN 2 ELSE 1 END,
            CASE WHEN v.state <> 1 THEN 0 WHEN m.send_at > v_now THEN 2 ELSE 1 END,
            CASE WHEN v.state = 1 THEN greatest(m.send_at, v_now) END,
            m.expire_at, v.reason, v_duplicate_of[d.n],
            (v.state = 2)::integer, v.attempt, v.attempt, CASE WHEN v.state = 2 THEN v_now END
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
            WHEN p.blocked_flags & m.flags & ~1 <> 0 THEN 1 ELSE 0 END)::smallint AS reason,
            CASE WHEN m.send_at IS NULL AND m.expire_at > v_now AND v_starts
                THEN p_h_attempt[d.m] END AS attempt
            OFFSET 0) AS w
        CROSS JOIN LATERAL (SELECT w.reason, CASE WHEN w.reason = 0 THEN w.attempt END AS attempt,
            (CASE WHEN w.reason > 0 THEN 10 WHEN w.attempt IS NOT NULL THEN 2 ELSE 1 END)::smallint
                AS state) AS v
        WHERE v_lost IS NULL OR m.id <> ALL (v_lost)
        ON CONFLICT DO NOTHING RETURNING deliveries.*
    ), queued AS (
        -- What is started is leased as if it had been claimed: what ends the session finds it here.
        INSERT INTO due (delivery_id, channel, project_id, priority, due_at, session_id, epoch, claims)
        SELECT id, channel, project_id, priority, coalesce(due_at, v_now),
            CASE WHEN state = 2 THEN p_h_session END,
            CASE WHEN state = 2 THEN p_h_epoch ELSE 0 END, (state = 2)::integer
        FROM inserted WHERE state = 2 OR (state = 1 AND due_at <= v_now + interval '10 minutes')
    ), put_off AS (
        INSERT INTO scheduled (delivery_id, channel, project_id, priority, due_at)
        SELECT id, channel, project_id, priority, due_at FROM inserted
        WHERE state = 1 AND due_at > v_now + interval '10 minutes'
    )
    SELECT array_agg(ROW(inserted.*)::deliveries) INTO v_rows FROM inserted;

    IF v_rows IS NOT NULL THEN
        -- As append_events does it, for deliveries that no attempt has ended of. What is started was
        -- queued before that, and both are told.
        PERFORM pg_advisory_xact_lock(1835466752 + p_lane);
        INSERT INTO events (lane, seq, project_id, kind, occurred_at, actor, message_id, delivery_id,
            recipient, role, possibly_sent, suppression_reason, duplicate_of, channel,
            old_state, state, version, wait_reason, due_at, attempt_count, call_id,
            attempt_started_at)
        SELECT p_lane, nextval('feed_seq'), d.project_id, 16, v_now, '', message_of(d.id), d.id,
            d.recipient, d.role, d.possibly_sent, d.suppression_reason, d.duplicate_of, d.channel, e.*
        FROM unnest(v_rows) AS d
        CROSS JOIN LATERAL (
            SELECT 0, d.state, 1, d.wait_reason, d.due_at, 0, NULL::uuid, NULL::timestamptz
                WHERE d.state <> 2
            UNION ALL SELECT 0, 1, 1, 1, v_now, 0, NULL, NULL WHERE d.state = 2
            UNION ALL SELECT 1, 2, 2, 0, NULL, 1, d.call_id, v_now WHERE d.state = 2
        ) AS e;
    END IF;

    RETURN QUERY SELECT 'known', l.id, NULL::uuid, NULL::smallint, NULL::uuid
        FROM unnest(v_lost) AS l(id);
    RETURN QUERY SELECT 'suppressed', message_of(r.id), r.id, r.suppression_reason, r.duplicate_of
        FROM unnest(v_rows) AS r WHERE r.state = 10;
    IF cardinality(p_h_attempt) > 0 AND NOT v_starts THEN
        RETURN QUERY SELECT 'unstarted', NULL::uuid, NULL::uuid, NULL::smallint, NULL::uuid;
    END IF;
END $$;

-- What was handed over to a session and runs there, with all that sending it takes. The bounds of the
-- ids come first, as everywhere (0003).
CREATE FUNCTION read_handed(p_session bigint, p_id uuid[], p_attempt uuid[])
RETURNS TABLE (
    id uuid, recipient text, role smallint, state smallint, state_since timestamptz,
    version integer, mode smallint, flags integer, attempt_count integer, spared integer,
    due_at timestamptz, wait_reason smallint, expire_at timestamptz, forced boolean,
    possibly_sent boolean, suppression_reason smallint, duplicate_of uuid, attempt_id uuid,
    call_id uuid, channel text, attempt_started_at timestamptz, project text,
    created_at timestamptz, subject text, tags jsonb, custom_args jsonb, correlation_id text,
    options jsonb, content bytea
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_first uuid := message_of(first_of(p_id));
    v_last  uuid := last_of(p_id);
BEGIN
    RETURN QUERY SELECT d.id, d.recipient, d.role, d.state, d.state_since, d.version, d.mode, d.flags,
        d.attempt_count, d.spared, d.due_at, d.wait_reason, d.expire_at, d.forced, d.possibly_sent,
        d.suppression_reason, d.duplicate_of, d.attempt_id, d.call_id, d.channel,
        d.attempt_started_at, p.name, m.created_at, m.subject, m.tags, m.custom_args,
        m.correlation_id, m.options, m.content
    FROM unnest(p_id, p_attempt) AS k(id, attempt)
    JOIN due q ON q.delivery_id = k.id AND q.session_id = p_session
    CROSS JOIN LATERAL (SELECT * FROM deliveries d WHERE d.id = k.id
        AND d.id BETWEEN v_first AND v_last AND d.state = 2 AND d.attempt_id = k.attempt LIMIT 1) AS d
    CROSS JOIN LATERAL (SELECT * FROM messages m WHERE m.id = message_of(k.id)
        AND m.id BETWEEN v_first AND v_last LIMIT 1) AS m
    JOIN projects p ON p.id = m.project_id;
END $$;
