-- The two widest statements take rows. The driver looks at each element of an array, whether it is an array
-- itself, in Python and for longer than it takes to encode it; of a row it looks once. What they do with
-- the rows is as before: servers and workers of the version before call those functions by themselves.

CREATE TYPE new_message AS (
    id uuid, project_id integer, request_id text, fingerprint bytea, correlation_id text, subject text,
    tags jsonb, custom_args jsonb, options jsonb, flags integer, content bytea, channel text,
    priority smallint, mode smallint, send_at timestamptz, expire_at timestamptz,
    dedupe_s double precision
);

-- `message` is the index of its message among those that come with it, from 1.
CREATE TYPE new_delivery AS (
    message integer, id uuid, recipient text, role smallint, dedupe_key bytea
);

CREATE TYPE attempt_result AS (
    delivery_id uuid, id uuid, number integer, call_id uuid, channel text, provider text,
    started_at timestamptz, ended_at timestamptz, outcome smallint, cause smallint,
    status_code integer, enhanced_code text, text text, provider_message_id text,
    retry_after_ms integer, state smallint, possibly_sent boolean, due_at timestamptz,
    wait_reason smallint, spares boolean, late_state smallint
);

-- See the function that it calls (0006).
CREATE FUNCTION enqueue_messages(
    p_lane integer, p_rule integer, p_messages new_message[], p_deliveries new_delivery[],
    p_a_message uuid[], p_a_position smallint[], p_a_data bytea[],
    p_h_session bigint, p_h_epoch integer, p_h_channel text, p_h_attempt uuid[]
) RETURNS TABLE (what text, message_id uuid, delivery_id uuid, reason smallint, duplicate_of uuid)
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN QUERY SELECT e.* FROM
        (SELECT array_agg(m.id) AS id, array_agg(m.project_id) AS project_id,
            array_agg(m.request_id) AS request_id, array_agg(m.fingerprint) AS fingerprint,
            array_agg(m.correlation_id) AS correlation_id, array_agg(m.subject) AS subject,
            array_agg(m.tags) AS tags, array_agg(m.custom_args) AS custom_args,
            array_agg(m.options) AS options, array_agg(m.flags) AS flags,
            array_agg(m.content) AS content, array_agg(m.channel) AS channel,
            array_agg(m.priority) AS priority, array_agg(m.mode) AS mode,
            array_agg(m.send_at) AS send_at, array_agg(m.expire_at) AS expire_at,
            array_agg(m.dedupe_s) AS dedupe_s
        FROM unnest(p_messages) AS m) AS m
    CROSS JOIN
        (SELECT array_agg(d.message) AS message, array_agg(d.id) AS id,
            array_agg(d.recipient) AS recipient, array_agg(d.role) AS role,
            array_agg(d.dedupe_key) AS dedupe_key
        FROM unnest(p_deliveries) AS d) AS d
    CROSS JOIN LATERAL enqueue_messages(p_lane, m.id, m.project_id, m.request_id, m.fingerprint,
        p_rule, m.correlation_id, m.subject, m.tags, m.custom_args, m.options, m.flags, m.content,
        m.channel, m.priority, m.mode, m.send_at, m.expire_at, m.dedupe_s,
        p_a_message, p_a_position, p_a_data,
        d.message, d.id, d.recipient, d.role, d.dedupe_key,
        p_h_session, p_h_epoch, p_h_channel, p_h_attempt) AS e;
END $$;

-- See the function that it calls (0002, 0004).
CREATE FUNCTION record_outcomes(
    p_lane integer, p_results attempt_result[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM record_outcomes(p_lane, r.delivery_id, r.id, r.number, r.call_id, r.channel, r.provider,
        r.started_at, r.ended_at, r.outcome, r.cause, r.status_code, r.enhanced_code, r.text,
        r.provider_message_id, r.retry_after_ms, r.state, r.possibly_sent, r.due_at, r.wait_reason,
        r.spares, r.late_state, p_without_proof)
    FROM (SELECT array_agg(r.delivery_id) AS delivery_id, array_agg(r.id) AS id,
            array_agg(r.number) AS number, array_agg(r.call_id) AS call_id,
            array_agg(r.channel) AS channel, array_agg(r.provider) AS provider,
            array_agg(r.started_at) AS started_at, array_agg(r.ended_at) AS ended_at,
            array_agg(r.outcome) AS outcome, array_agg(r.cause) AS cause,
            array_agg(r.status_code) AS status_code, array_agg(r.enhanced_code) AS enhanced_code,
            array_agg(r.text) AS text, array_agg(r.provider_message_id) AS provider_message_id,
            array_agg(r.retry_after_ms) AS retry_after_ms, array_agg(r.state) AS state,
            array_agg(r.possibly_sent) AS possibly_sent, array_agg(r.due_at) AS due_at,
            array_agg(r.wait_reason) AS wait_reason, array_agg(r.spares) AS spares,
            array_agg(r.late_state) AS late_state
        FROM unnest(p_results) AS r) AS r;
END $$;
