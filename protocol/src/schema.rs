//! JSON Schema for types that are written as text.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::{ByteSize, ClientId, LinkSpeed, Name, Percent, Span};

macro_rules! text_schema {
    ($name:ident, $what:literal, $schema:tt) => {
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let mut schema = json_schema!($schema);
                schema.insert("description".to_owned(), $what.into());
                schema
            }
        }
    };
}

text_schema!(Name, "1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot or a dash", {
    "type": "string",
    "pattern": "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
});
text_schema!(ByteSize, "a number of bytes, or a text like 64MiB, 1.5GiB or 2T", {
    "type": ["integer", "string"],
    "minimum": 0
});
text_schema!(Span, "a duration like 30s, 5m, 1h30m or 8h", { "type": "string" });
text_schema!(LinkSpeed, "bits a second, like 10Gbps or 2.5Gbps", { "type": "string" });
text_schema!(Percent, "a whole percentage from 0% to 100%", { "type": "string", "pattern": "^[0-9]{1,3} ?%$" });
text_schema!(ClientId, "32 hexadecimal digits", { "type": "string", "pattern": "^[0-9a-fA-F]{32}$" });
